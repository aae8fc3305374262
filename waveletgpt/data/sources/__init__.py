"""Where documents come from: files and archives, tables, named data sets, the Hugging Face hub."""
