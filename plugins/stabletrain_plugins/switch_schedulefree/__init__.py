"""Validate, test and save the averaged weights of a schedule-free optimizer, and train the others."""
