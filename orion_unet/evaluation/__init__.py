"""Judging a trained model against measured markers. It predicts through ``inference`` alone."""
