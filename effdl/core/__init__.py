"""Machinery that knows no paper. Import the module you need; nothing is re-exported here."""
