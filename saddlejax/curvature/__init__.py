"""Curvature of the loss by Hessian-vector products."""
