"""What stands behind the commands of ``effdl.cli``; each is imported when its command is called."""
