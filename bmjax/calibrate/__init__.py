"""Merges that look at data: RegMean, Fisher from a calibration set, learned coefficients, joint steps afterwards."""
