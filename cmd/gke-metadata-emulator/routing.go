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

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

func routingCommand() *cobra.Command {
	return group("routing", "Install, check, remove, show, count and watch the redirect rules",
		routingInstallCommand(), routingCheckCommand(), routingRemoveCommand(), routingShowCommand(),
		routingObserveCommand(), routingWatchCommand())
}

func routingInstallCommand() *cobra.Command {
	var onStart bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the rules, from any earlier state",
		Long: `Install the rules, from any earlier state, and read them back.
With a broken configuration the rules of the last valid one are installed. Without one since the node booted pods are
redirected as by default, to the service, which answers 503 with the reason; where that cannot be had, only the guard
is installed. Both are reported on standard error and are no failure.`,
		Example: `  sudo gke-metadata-emulator routing install`,
		Args:    arguments,
	}
	cmd.Flags().BoolVar(&onStart, "on-start", false,
		"after a failure wait before the exit, 250ms at first and 15s at most, "+
			"because systemd starts the service again at once")
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { // also for a flag of another version
		err = cmd.Root().FlagErrorFunc()(cmd, err)
		if onStart {
			backOff(cmd, routing.NoteInstall(runDir(), err))
		}
		return err
	})
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if c, err := load(); onStart && err == nil { // the service's user does not see whose a socket is
			if text := held("healthListen", "", c.HealthListen, routing.Listener(c.HealthListen)); text != "" {
				say(cmd, "%s", text)
			}
		}
		p := plan(cmd, load, "").ResolveAuto(cmd.Context())
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

// backOff waits before the exit, until SIGTERM at the latest.
func backOff(cmd *cobra.Command, f *routing.Failure) {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	say(cmd, "routing install failed %d times in a row since %s: next try in %s: run `%s doctor`", f.Times,
		f.Since.Format(time.TimeOnly), f.Delay(), program)
	select {
	case <-time.After(f.Delay()):
	case <-ctx.Done():
	}
}

func routingCheckCommand() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Print what is missing of the rules",
		Long: `Print what is missing of the rules, one item a line, and exit with status 1. Print nothing when the rules are
complete. Nothing is changed. With a missing or broken configuration the rules of the last install are
checked.`,
		Example: `  sudo gke-metadata-emulator routing check
  sudo gke-metadata-emulator routing check --wait=30s`,
		Args: arguments,
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "check again until the rules are complete, for this long at most")
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		const consequence = "without a valid configuration, the rules of the last install are checked"
		p := plan(cmd, load, consequence).AsInstalled(cmd.Context())
		return withRouter(cmd, p, func(r routing.Router, ctx context.Context) error {
			err := untilNil(ctx, wait, r.Check)
			if errors.Is(err, fault.ErrMissing) {
				return fmt.Errorf("the rules are not complete:\n%w", err)
			}
			return err
		})
	}
	return cmd
}

// untilNil calls ask until it returns nil or an error that will not change, or until wait is over,
// and returns the last result.
func untilNil(ctx context.Context, wait time.Duration, ask func(context.Context) error) error {
	over := time.After(wait)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx)
		if err == nil || wait <= 0 || errors.Is(err, fault.ErrPermission) {
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
		Short: "Remove all rules of this service",
		Long: `Remove all rules of this service, whatever version and configuration installed them.
Afterwards pods reach the cloud's own metadata server again.`,
		Example: `  sudo gke-metadata-emulator routing remove`,
		Args:    arguments,
	}
	cmd.Flags().BoolVar(&onStop, "on-stop", false,
		"remove only if systemd is stopping the service, and not for a restart, after a crash, at poweroff or with "+
			"routing.onStop: keep; the socket is stopped too")
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if onStop {
			if rulesStay(cmd, load) {
				return nil
			}
			if err := service.StopListening(cmd.Context()); err != nil {
				say(cmd, "the socket is not stopped: %v: the next connection starts the service again", err)
			}
		}
		err := withRouter(cmd, plan(cmd, load, "the rules are removed").AsInstalled(cmd.Context()), routing.Router.Remove)
		if err == nil {
			routing.NoteInstall(runDir(), nil) // no install is desired any more
		}
		return err
	}
	return cmd
}

// rulesStay reports whether the rules stay when the service ends. If that is unknown, the rules
// stay: closed and never open (R-01, life of the rules).
func rulesStay(cmd *cobra.Command, load func() (config.Config, error)) bool {
	stopped, err := service.StoppedForGood(cmd.Context())
	if err != nil {
		say(cmd, "the rules stay: %v", err)
	}
	if !stopped {
		return true
	}
	c, err := load()
	if err == nil {
		return c.Routing.OnStop == "keep"
	}
	if _, absent := os.Stat(configFile(cmd)); errors.Is(absent, fs.ErrNotExist) {
		return false // no configuration, so no routing.onStop: keep
	}
	say(cmd, "the rules stay: the configuration is broken, so routing.onStop is unknown: remove them with `%s routing "+
		"remove`", program)
	return true
}

func routingShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print the work of install on this node as shell commands",
		Example: `  gke-metadata-emulator routing show
  gke-metadata-emulator routing show --routing-mode auto`,
		Args: arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		p := plan(cmd, load, "").ResolveAuto(cmd.Context())
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
		Short: "Print the connections to the metadata server that mode observe counted",
		Long: `Print the connections to 169.254.169.254:80 since routing.mode: observe was installed, with their number,
network and cgroup, which names the pod. A mode that redirects has this service answer them.
It answers those of network "host" only where pods on the host network are redirected too. The node's own
daemons are not listed. Not counted are pods with a kernel of their own (gVisor, Kata), and packets that are
sent without connect().`,
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
		Short: "Restore rules that other programs remove, until SIGTERM",
		Long: `Restore rules that other programs remove, until SIGTERM. The desired state is that of the last install or
remove, whoever ran it. Without either since the node booted, the desired state is the configuration's, and
with a missing or broken configuration that of an unconfigured node, see routing install. SIGHUP reads the
configuration again; a broken one changes nothing.`,
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
		return service.WatchRouting(ctx, service.Options{Load: load, Reload: reload, RunDir: runDir(),
			Stderr: cmd.ErrOrStderr()},
			func(c config.Config, err error) routing.Plan { return planOf(c, err != nil).ResolveAuto(ctx) })
	}
	return cmd
}

// plan returns the configuration's routing. Without a valid configuration it returns the closed
// Plan (R-23, broken configuration), and prints the consequence; "" is what pods meet.
func plan(cmd *cobra.Command, load func() (config.Config, error), consequence string) routing.Plan {
	c, err := load()
	if err != nil {
		switch {
		case consequence != "":
		case routing.RedirectsNobody(c.Routing.Mode):
			consequence = "mode " + c.Routing.Mode + " redirects nobody"
		default:
			consequence = "pods are answered 503 with the reason"
		}
		why := explain(err)
		if onStart := cmd.Flags().Lookup("on-start"); onStart != nil && onStart.Changed {
			why = "there is no valid configuration" // the service starts next, and logs the faults
		}
		say(cmd, "%s: %s", consequence, why)
		c.Log = config.Default().Log
	}
	p := planOf(c, err != nil)
	p.Log = service.CommandLog(c.Log, cmd.ErrOrStderr())
	return p
}

// planOf makes the Plan of a configuration. The closed one has the default of everything but what
// keeps pods out, spares interfaces or redirects nothing: the valid ones of those keys hold.
func planOf(c config.Config, closed bool) routing.Plan {
	if closed {
		r := c.Routing
		c = config.Default()
		c.Routing.Guard = append(c.Routing.Guard, r.Guard...)
		c.Routing.Uplinks, c.Routing.ExcludeInterfaces = r.Uplinks, r.ExcludeInterfaces
		if routing.RedirectsNobody(r.Mode) {
			c.Routing.Mode = r.Mode
		}
	}
	return routing.Plan{
		Mode: c.Routing.Mode, Listen: c.Listen, Listen6: c.Listen6, Uplinks: c.Routing.Uplinks,
		DNS:               c.DNS == "answer",
		ExcludeInterfaces: c.Routing.ExcludeInterfaces,
		InterceptHostPods: c.Routing.InterceptHostPods, Guard: c.Routing.Guard, Link: c.Routing.Link, Force: c.Routing.Force,
		Closed: closed, RunDir: runDir(),
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
