"""Readers of count matrices: each opens one kind of file and yields its rows in bounded memory."""
