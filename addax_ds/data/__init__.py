"""From files to the tensors of a step: records -> encoding -> partition -> batches."""
