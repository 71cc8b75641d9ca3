"""Helpers that several rooms of the tests share: a second caller means that a helper moves here."""
