"""Operators of vpd_fast in other people's models; one module per library, imported by whoever has that library."""
