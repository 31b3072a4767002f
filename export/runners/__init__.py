"""What asks an artifact's questions in other runtimes: scripts that are run, never imported; see `runtimes`."""
