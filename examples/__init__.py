"""Programs to run and to read: sgd_digits.py is the training job, demo.py kills it and looks."""
