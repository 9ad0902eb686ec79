"""What other packages make of the same layers and losses, measured against dense matrices.

The packages come with the extra ``peers``; one that is not installed leaves cells that say so.
"""
