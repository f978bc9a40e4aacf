# Driver of gargle, which provides the credentials of Google's packages for R; ring/client.go has the
# questions.
suppressMessages(library(gargle))
scope <- "https://www.googleapis.com/auth/devstorage.read_only"
platform <- "https://www.googleapis.com/auth/cloud-platform"

credentials <- function(scopes) {
  token <- credentials_gce(scopes = scopes)
  if (is.null(token)) stop("credentials_gce returns NULL")
  token
}
ask <- list(
  version = function() as.character(packageVersion("gargle")),
  detect = function() if (is.null(credentials_gce(scopes = platform))) "false" else "true",
  token = function() credentials(platform)$credentials$access_token,
  scoped = function() credentials(scope)$credentials$access_token
)
input <- file("stdin", open = "r")
while (length(question <- readLines(input, n = 1)) > 0) {
  answer <- if (is.null(ask[[question]])) {
    list(none = TRUE)
  } else {
    tryCatch(list(value = ask[[question]]()), error = function(e) list(error = substr(conditionMessage(e), 1, 500)))
  }
  cat(jsonlite::toJSON(answer, auto_unbox = TRUE), "\n", sep = "")
  flush(stdout())
}
