"""Pretrained networks and streams of texts: classifiers, adapters and language models."""
