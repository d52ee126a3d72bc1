"""Folders with which a hosted platform trains: rows in its form, its job files, and the commands for it.

Nothing is sent from here. What a platform would refuse only after it was submitted is refused when the folder is
written.
"""
