package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

func routingCommand() *cobra.Command {
	return group("routing", "Bring pods' requests to the service, or check, remove and show what does",
		routingInstallCommand(), routingCheckCommand(), routingRemoveCommand(), routingShowCommand(), routingObserveCommand(), routingWatchCommand())
}

func routingInstallCommand() *cobra.Command {
	var onStart bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put up the rules, whatever stands already",
		Long: `Put up the rules, whatever stands already, and read them back.
Where the configuration is missing or broken, only the guard goes up, so that no pod reaches the cloud's own metadata
server: that is said on standard error and is no failure.`,
		Example: `  sudo gke-metadata-emulator routing install`,
		Args:    arguments,
	}
	cmd.Flags().BoolVar(&onStart, "on-start", false, "after a failure wait before exiting: 250ms after the first in a row, 15s at most, "+
		"since systemd starts the service again at once")
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { // a flag that only another version has fails here
		err = cmd.Root().FlagErrorFunc()(cmd, err)
		if onStart {
			backOff(cmd, routing.NoteInstall(runDir(), err))
		}
		return err
	})
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		p := plan(cmd, load, "only the guard goes up").Fitted(cmd.Context())
		if p.Reason != "" {
			p.Log.WithField("mode", p.Mode).Info("routing.mode auto: " + p.Reason)
		}
		err := withRouter(cmd, p, routing.Router.Install)
		if failed := routing.NoteInstall(p.RunDir, err); failed != nil && onStart {
			backOff(cmd, failed)
		}
		return err
	}
	return cmd
}

// backOff waits until it is worth another try, or for SIGTERM.
func backOff(cmd *cobra.Command, f *routing.Failure) {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	say(cmd, "routing install failed %d times in a row since %s: next try in %s: run `%s doctor` to see what is wrong", f.Times, f.Since.Format(time.TimeOnly), f.Delay(), program)
	select {
	case <-time.After(f.Delay()):
	case <-ctx.Done():
	}
}

func routingCheckCommand() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what of the rules is missing, and change nothing",
		Long: `Say what of the rules is missing, one a line, and exit with 1; say nothing when all stands. Nothing is changed.
Where the configuration is missing or broken, the guard is what has to stand.`,
		Example: `  sudo gke-metadata-emulator routing check
  sudo gke-metadata-emulator routing check --wait=30s`,
		Args: arguments,
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "ask again until all stands, for this long at most (30s in front of kubelet)")
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		p := plan(cmd, load, "only the guard is checked").AsInstalled(cmd.Context())
		return withRouter(cmd, p, func(r routing.Router, ctx context.Context) error {
			err := untilNil(ctx, wait, r.Check)
			if errors.Is(err, routing.ErrMissing) {
				return fmt.Errorf("this does not stand as it should:\n%w", err)
			}
			return err
		})
	}
	return cmd
}

// untilNil asks until the answer is nil, will not change or wait is over, and returns the last answer.
func untilNil(ctx context.Context, wait time.Duration, ask func(context.Context) error) error {
	over := time.After(wait)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx)
		if err == nil || wait <= 0 || errors.Is(err, routing.ErrPermission) {
			return err
		}
		select {
		case <-tick.C:
		case <-over:
			return err
		case <-ctx.Done():
			return err
		}
	}
}

func routingRemoveCommand() *cobra.Command {
	var onStop bool
	cmd := &cobra.Command{
		Use:   "remove",
		Short: "Take the rules away without a trace",
		Long: `Take the rules away without a trace, whoever put them up and whatever the configuration says.
From then on pods reach the cloud's own metadata server again.`,
		Example: `  sudo gke-metadata-emulator routing remove`,
		Args:    arguments,
	}
	cmd.Flags().BoolVar(&onStop, "on-stop", false, "only if systemd is stopping the service for good, and routing.onStop is not keep: not to restart it, not after a crash, not at poweroff; the socket is stopped too")
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if onStop {
			if rulesStay(cmd, load) {
				return nil
			}
			if err := service.StopListening(cmd.Context()); err != nil {
				say(cmd, "%v: the next connection starts the service again", err)
			}
		}
		err := withRouter(cmd, plan(cmd, load, "removing all the same").AsInstalled(cmd.Context()), routing.Router.Remove)
		if err == nil {
			routing.NoteInstall(runDir(), nil) // an install is not wanted any more
		}
		return err
	}
	return cmd
}

// rulesStay reports whether the end of the service is not the end of the rules. What cannot be found out counts as yes:
// closed, never open.
func rulesStay(cmd *cobra.Command, load func() (config.Config, error)) bool {
	stopped, err := service.StoppedForGood(cmd.Context())
	if err != nil {
		say(cmd, "%v: the rules stay", err)
	}
	if !stopped {
		return true
	}
	c, err := load()
	if err == nil {
		return c.Routing.OnStop == "keep"
	}
	if _, absent := os.Stat(configFile(cmd)); errors.Is(absent, fs.ErrNotExist) {
		return false // nobody asked for them to stay
	}
	say(cmd, "the configuration is broken, so whether routing.onStop is keep is not known: the rules stay; `%s routing remove` removes them", program)
	return true
}

func routingShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print what install does on this node, as shell commands",
		Example: `  gke-metadata-emulator routing show
  gke-metadata-emulator routing show --routing-mode auto`,
		Args: arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		p := plan(cmd, load, "only the guard would go up").Fitted(cmd.Context())
		if p.Reason != "" {
			fmt.Fprintf(cmd.OutOrStdout(), "# auto: %s: %s\n\n", p.Mode, p.Reason)
		}
		text, err := routing.Show(p)
		if err != nil {
			return fmt.Errorf("routing: %w", err)
		}
		fmt.Fprint(cmd.OutOrStdout(), text)
		return nil
	}
	return cmd
}

func routingObserveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "observe",
		Short: "Print who connected to the metadata server, where routing.mode is observe",
		Long: `Print who connected to 169.254.169.254:80 since routing.mode: observe was installed: how often, from which network, and by
which cgroup, which names the pod. Those are who gets this service's answers with mode iptables or ebpf; "host" only where pods
on the host network are redirected too. The host's own daemons are not listed.
Not seen are pods that bring a kernel of their own (gVisor, Kata), and who sends packets without connect().`,
		Example: `  sudo gke-metadata-emulator routing install --routing-mode observe
  sudo gke-metadata-emulator routing observe`,
		Args: arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := load()
		if err != nil {
			return err
		}
		c.Routing.Mode, c.Listen6 = routing.ModeObserve, netip.AddrPort{}
		all, err := routing.Observed(planOf(c, false))
		if err != nil {
			return fmt.Errorf("routing: %w", err)
		}
		return status.WriteObserved(cmd.OutOrStdout(), all)
	}
	return cmd
}

func routingWatchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Put back what others flush, until SIGTERM",
		Long: `Put back what others flush, until SIGTERM: what install put up last, whoever ran it. What remove took away stays away.
Where neither was run since the node booted, what the configuration says goes up, and where it is missing or broken
the guard alone. SIGHUP reads the configuration anew; one that does not load changes nothing.`,
		Example: `  sudo gke-metadata-emulator routing watch`,
		Args:    arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		reload := make(chan os.Signal, 1)
		signal.Notify(reload, syscall.SIGHUP)
		defer signal.Stop(reload)
		return service.WatchRouting(ctx, service.Options{Load: load, Reload: reload, RunDir: runDir(), Stderr: cmd.ErrOrStderr()},
			func(c config.Config, err error) routing.Plan { return planOf(c, err != nil).Fitted(ctx) })
	}
	return cmd
}

// plan is what the configuration says about routing; without one it is the closed guard, and consequence is said.
func plan(cmd *cobra.Command, load func() (config.Config, error), consequence string) routing.Plan {
	c, err := load()
	if err != nil {
		say(cmd, "%s: %s", consequence, explain(err))
		c.Log = config.Default().Log
	}
	log := logrus.New()
	log.SetOutput(cmd.ErrOrStderr())
	log.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true})
	if level, err := logrus.ParseLevel(c.Log.Level); err == nil {
		log.SetLevel(level)
	}
	p := planOf(c, err != nil)
	p.Log = log
	return p
}

func planOf(c config.Config, closed bool) routing.Plan {
	if closed {
		c = config.Default()
	}
	return routing.Plan{
		Mode: c.Routing.Mode, Listen: c.Listen, Listen6: c.Listen6, Uplinks: c.Routing.Uplinks, Spare: c.Routing.Spare,
		InterceptHostPods: c.Routing.InterceptHostPods, Guard: c.Routing.Guard, Link: c.Routing.Link, Force: c.Routing.Force, Closed: closed, RunDir: runDir(),
	}
}

func withRouter(cmd *cobra.Command, p routing.Plan, do func(routing.Router, context.Context) error) error {
	r, err := routing.New(p)
	if err != nil {
		return fmt.Errorf("routing: %w", err)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return do(r, ctx)
}

func say(cmd *cobra.Command, format string, args ...any) {
	fmt.Fprintf(cmd.ErrOrStderr(), program+": "+format+"\n", args...)
}
