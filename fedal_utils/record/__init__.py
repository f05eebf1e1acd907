"""What happened: run folders that resume, records, tables, verdicts."""
