"""Mixers that read a text token by token into a state of fixed size: recurrences and linear attention."""
