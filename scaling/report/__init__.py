"""What an analysis says: tables for the terminal, plots, and one page that opens offline."""
