"""Data: records -> encoding -> partition -> batches, up to a step's tensors."""
