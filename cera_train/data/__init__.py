"""Rows -> ids and masks -> micro-batches."""
