"""Makes a trained network part of the package: its weights in float16, and the card beside them.

python experiments/ship.py runs/best-0 capsnet-mnist

The card's error is that of the float16 file, tested here after it was written.
"""
