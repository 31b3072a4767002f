"""`python -m distill`, which launchers of several processes take: `torchrun -m distill train recipe.yaml`."""

from distill.cli import main

if __name__ == "__main__":
    main()
