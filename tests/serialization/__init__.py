"""Tests of `autoreg_vit.serialization`."""
