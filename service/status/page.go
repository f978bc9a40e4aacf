package status

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// look is how a text is laid out.
type look struct {
	Width int  // columns, at which lines are wrapped; 0: they are not, for grep
	Color bool // by ANSI escapes
}

// maxWidth is the most columns of a line on a terminal.
const maxWidth = 100

// lookOf returns the look for what w is. Only a terminal has a width and colors, and no colors
// where the environment has NO_COLOR (no-color.org) or TERM=dumb.
func lookOf(w io.Writer) look {
	f, ok := w.(*os.File)
	if !ok {
		return look{}
	}
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil {
		return look{}
	}
	look := look{Width: maxWidth, Color: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col >= 60 {
		look.Width = min(maxWidth, int(size.Col))
	}
	return look
}

// color is an ANSI escape's number.
type color int

const (
	plain color = 0
	bold  color = 1
	red   color = 31
	green color = 32
)

// page is a text that grows.
type page struct {
	strings.Builder
	look look
}

// nameWidth is the width of the names in front of lines.
const nameWidth = 13

func (p *page) paint(c color, text string) string {
	if !p.look.Color || c == plain || text == "" {
		return text
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", c, text)
}

// line writes a text behind its name, whoever wrote the text, on one line. What does not fit
// continues below the text.
func (p *page) line(c color, name, format string, args ...any) {
	text := strings.TrimRight(OneLine(fmt.Sprintf(format, args...)), " ")
	for _, part := range wrap(text, p.look.Width-nameWidth) {
		fmt.Fprintf(p, "%-*s%s\n", nameWidth-1, name, " "+p.paint(c, part))
		name = ""
	}
}

// row is one of a table's, with what is wrong about it.
type row struct {
	fault string
	cells []string
}

// table writes rows below a head, each with its fault below it. Without rows it writes the title
// alone. What does not fit into a column continues below, within it.
func (p *page) table(title string, rows []row, head ...string) {
	fmt.Fprintf(p, "\n%s\n", p.paint(bold, fmt.Sprintf("%s: %d", title, len(rows))))
	if len(rows) == 0 {
		return
	}
	widths := make([]int, len(head))
	for _, r := range append([]row{{cells: head}}, rows...) {
		for i, cell := range r.cells {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	shrink(widths, p.look.Width)
	p.cells(head, widths)
	for _, r := range rows {
		p.cells(r.cells, widths)
		if r.fault != "" {
			for _, part := range wrap("error: "+OneLine(r.fault), p.look.Width-2) {
				p.WriteString("  " + p.paint(red, part) + "\n")
			}
		}
	}
}

// columnGap is between two columns of a table.
const columnGap = 2

// shrink makes the widest columns narrower, until all fit into the width; 0: there is none.
func shrink(widths []int, width int) {
	for width > 0 {
		sum, widest := -columnGap, 0
		for i, w := range widths {
			if sum += w + columnGap; w > widths[widest] {
				widest = i
			}
		}
		if sum <= width || widths[widest] <= 8 {
			return
		}
		widths[widest]--
	}
}

// cells writes one row, on as many lines as its longest cell needs.
func (p *page) cells(cells []string, widths []int) {
	columns, lines := make([][]string, len(cells)), 0
	for i, cell := range cells {
		columns[i] = wrap(printable(cell), widths[i])
		lines = max(lines, len(columns[i]))
	}
	for n := range lines {
		var b strings.Builder
		for i, c := range columns {
			text := ""
			if n < len(c) {
				text = c[n]
			}
			fmt.Fprintf(&b, "%-*s", widths[i]+columnGap, text)
		}
		p.WriteString(strings.TrimRight(b.String(), " ") + "\n")
	}
}

// wrap cuts a text into lines of at most width columns: at a space where there is one, else behind
// a character at which names are read in parts. A width of 0 or less cuts nothing.
func wrap(text string, width int) (lines []string) {
	for left := []rune(text); ; {
		if width <= 0 || len(left) <= width {
			return append(lines, string(left))
		}
		at := width
		for at > 0 && left[at] != ' ' {
			at--
		}
		if at == 0 {
			at = width
			for at > 1 && !strings.ContainsRune("-/@.:,&", left[at-1]) {
				at--
			}
			if at == 1 {
				at = width
			}
		}
		lines = append(lines, strings.TrimRight(string(left[:at]), " "))
		left = []rune(strings.TrimLeft(string(left[at:]), " "))
	}
}
