"""vpd_fast in other libraries: its operators in their models, its models in their programs; one module per library."""
