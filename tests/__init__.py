"""Tests of the library, their oracles and their cases."""
