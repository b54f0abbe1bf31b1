"""Layer 6: the command line. The only readers of sys.argv and os.environ; everything below receives values."""
