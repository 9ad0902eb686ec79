"""Pretrained networks on streams of texts and images; and small language models."""
