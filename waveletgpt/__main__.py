from waveletgpt.cli.main import main

main()
