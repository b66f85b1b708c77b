"""The phases in order, resumable stage by stage; only this package knows the order."""
