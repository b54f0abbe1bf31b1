"""The fine-tuning job: set up, step, report, save."""
