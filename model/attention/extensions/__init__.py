"""Extensions of grouped-query attention from 2024 to 2026, each equal to it at a stated value."""
