"""Tests, laid out as the package is; `behaviour/` holds what crosses its floors, `support/` what they share."""
