"""The example that balances a pole, with twice as many turns as it needs: so it is not over before
the ranks that a test kills are dead, however busy the machine."""

from examples import rl_cartpole

if __name__ == "__main__":
    rl_cartpole.TURNS = 12
    rl_cartpole.main()
