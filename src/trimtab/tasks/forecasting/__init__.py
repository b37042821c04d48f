"""Forecasting of several columns at once with a model of `trimtab.models.forecasting`."""

from trimtab.tasks.forecasting.forecasting_recipe import ForecastingRecipe
from trimtab.tasks.forecasting.recipes import published

__all__ = ["ForecastingRecipe", "published"]
