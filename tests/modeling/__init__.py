"""Tests of the model classes."""
