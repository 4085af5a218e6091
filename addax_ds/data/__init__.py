"""Data: sources -> records -> encoding -> partition -> batches, from files to a step's tensors."""
