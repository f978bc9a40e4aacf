// Progress runs its arguments, which are `go test -json …`. It prints a line for each top-level
// test that took a second or more, the output of tests that fail or are skipped, and the running
// tests when nothing else was printed for half a minute. go test itself prints nothing of packages
// that run side by side until one of them ends.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

const module = "github.com/gke-metadata-emulator/gke-metadata-emulator/"

// event is an event of test2json, or of a build by cmd/go.
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64 // seconds
}

// test is the key of a top-level test; name "" is the package itself.
type test struct{ pkg, name string }

type progress struct {
	running map[test]time.Time
	output  map[test]*strings.Builder
}

func main() {
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "progress:", err)
		os.Exit(1)
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for r := bufio.NewReader(out); ; {
			line, err := r.ReadString('\n')
			if line != "" {
				lines <- line
			}
			if err != nil {
				return
			}
		}
	}()
	p := progress{running: map[test]time.Time{}, output: map[test]*strings.Builder{}}
	for quiet := time.NewTicker(30 * time.Second); ; {
		select {
		case line, more := <-lines:
			if !more {
				os.Exit(code(cmd.Wait()))
			}
			var e event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				fmt.Print(line)
			} else if p.handle(e) {
				quiet.Reset(30 * time.Second)
			}
		case <-quiet.C:
			fmt.Println("        running:", p.names())
		}
	}
}

func code(err error) int {
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode()
	case err != nil:
		fmt.Fprintln(os.Stderr, "progress:", err)
		return 1
	}
	return 0
}

// handle handles an event. It reports whether it printed something.
func (p *progress) handle(e event) bool {
	name, sub, _ := strings.Cut(e.Test, "/")
	k := test{strings.TrimPrefix(e.Package, module), name}
	switch e.Action {
	case "build-output":
		fmt.Print(e.Output)
		return true
	case "run", "cont":
		if sub == "" {
			p.running[k] = time.Now()
		}
	case "pause":
		if sub == "" {
			delete(p.running, k)
		}
	case "output":
		if p.output[k] == nil {
			p.output[k] = new(strings.Builder)
		}
		p.output[k].WriteString(e.Output)
	case "pass", "fail", "skip":
		return sub == "" && p.ended(k, e)
	}
	return false
}

func (p *progress) ended(k test, e event) bool {
	if e.Action == "fail" && k.name == "" { // output of a test that was ended by a panic or -timeout
		for other, o := range p.output {
			if other.pkg == k.pkg && other != k {
				fmt.Print(o.String())
				delete(p.output, other)
				delete(p.running, other)
			}
		}
	}
	o := p.output[k]
	delete(p.output, k)
	delete(p.running, k)
	// test2json attributes the last output of a dying process to the test that was named last.
	died := o != nil && (strings.Contains(o.String(), "panic: ") || strings.Contains(o.String(), "fatal error: "))
	if e.Action == "pass" && k.name != "" && e.Elapsed < 1 && !died {
		return false
	}
	fmt.Printf("%-4s %6.1fs %s %s\n", e.Action, e.Elapsed, k.pkg, k.name)
	if o != nil && (died || e.Action == "fail" || e.Action == "skip" && k.name != "") {
		fmt.Print(o.String())
	}
	return true
}

// names lists the running tests, the oldest first.
func (p *progress) names() string {
	tests := slices.SortedFunc(maps.Keys(p.running), func(a, b test) int { return p.running[a].Compare(p.running[b]) })
	var names []string
	for _, t := range tests {
		names = append(names, fmt.Sprintf("%s %s (%v)", t.pkg, t.name, time.Since(p.running[t]).Round(time.Second)))
	}
	if len(names) > 6 {
		names = append(names[:6], fmt.Sprintf("%d more", len(names)-6))
	}
	if names == nil {
		return "the compiler"
	}
	return strings.Join(names, ", ")
}
