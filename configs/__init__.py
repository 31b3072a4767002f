"""Recipes that run, shipped as package data: `distill init NAME` copies one."""
