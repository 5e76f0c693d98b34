"""What became of a model, on one page of HTML that needs nothing else to be seen."""
