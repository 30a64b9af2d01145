"""Every setting of every command. Nothing heavy is imported here, so that --help is quick."""
