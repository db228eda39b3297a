"""Working parts that `fedprune new` begins files of one's own with: each is a plug-in as it stands."""
