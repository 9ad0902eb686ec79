"""How results are shown: tables in a terminal, figures, and a page with both."""
