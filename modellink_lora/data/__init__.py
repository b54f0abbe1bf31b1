"""From a data set to the micro-batches of a run: templates, records, token files, order, collation."""
