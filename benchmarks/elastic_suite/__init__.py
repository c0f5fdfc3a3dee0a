"""Runs under torchrun that lose a process and go on by themselves."""
