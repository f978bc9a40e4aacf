// Command golang is the driver of Google's libraries for Go. Its first argument is the
// library. Each line of standard input is a question, each line of standard output an answer in
// JSON; the ring's client.go has the questions.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"
)

const (
	scope    = "https://www.googleapis.com/auth/devstorage.read_only"
	audience = "https://run.example.com"
)

// errNone: the library has no such function.
var errNone = errors.New("none")

// library has the questions that a library can answer.
type library struct {
	module string
	ask    map[string]func(context.Context) (string, error)
}

func main() {
	libraries := map[string]func(endpoint string) library{
		"metadata": computeMetadata, "oauth2": oauth2Google, "auth": cloudAuth, "storage": cloudStorage,
		"registry": registryKeychain, "otel": openTelemetry,
	}
	l := libraries[os.Args[1]](os.Getenv("RING_STORAGE"))
	l.ask["version"] = func(context.Context) (string, error) { return versionOf(l.module) }
	say := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var a struct {
			Value string `json:"value"`
			Error string `json:"error,omitempty"`
			None  bool   `json:"none,omitempty"`
		}
		err := errNone
		if ask := l.ask[in.Text()]; ask != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			a.Value, err = ask(ctx)
			cancel()
		}
		if a.None = errors.Is(err, errNone); err != nil && !a.None {
			a.Error = err.Error()
		}
		_ = say.Encode(a) // an error: the ring has ended
	}
}

func versionOf(module string) (string, error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", errors.New("the program has no build information")
	}
	for _, d := range info.Deps {
		if d.Path == module {
			return d.Version, nil
		}
	}
	return "", fmt.Errorf("%s is not in the program", module)
}

// yes answers whether Google Cloud was detected.
func yes(err error) (string, error) { return strconv.FormatBool(err == nil), err }
