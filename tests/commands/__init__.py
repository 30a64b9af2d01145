"""Tests of `autoreg_vit.commands`."""
