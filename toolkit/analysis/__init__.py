"""Analyses: statistics or plain callables in, small frozen results out. No model is seen here."""
