"""What a leaderboard pull request needs: the folder, its description, and the rules it must keep."""
