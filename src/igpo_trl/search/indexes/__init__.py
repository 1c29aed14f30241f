"""Indexes of passages: BM25, dense, and hybrid."""
