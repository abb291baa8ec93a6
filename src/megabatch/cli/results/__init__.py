"""Verbs that read the folder of a run: its accuracy, predictions, exports, report and logs."""
