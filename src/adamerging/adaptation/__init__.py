"""Coefficients of a merge learned on unlabeled data; `adapt.adapt` is the way in."""
